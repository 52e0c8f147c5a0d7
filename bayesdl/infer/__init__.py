"""Methods of inference: everything that turns a model and data into a posterior."""
