"""From a model to a plan: reads the model, never changes it."""
