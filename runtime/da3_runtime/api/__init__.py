"""The request and response of the endpoint, and their JSON schemas."""
