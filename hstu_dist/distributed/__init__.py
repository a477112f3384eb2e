"""Process groups, sharding plans and the wrapping of a model for many ranks."""
