"""Loading a model, and running images through it for many requests at once."""
