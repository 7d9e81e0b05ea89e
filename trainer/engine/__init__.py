"""All of DeepSpeed: the engine, its optimizers, and how a model is cut across processes."""
