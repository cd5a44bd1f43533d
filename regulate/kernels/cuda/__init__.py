"""The kernels in Triton, and a trial of them on the device at hand."""
