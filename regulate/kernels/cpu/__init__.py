"""The kernels in C++: compiling them, keeping and loading the library, and calling the step of a cell."""
