"""The ways of serving: HTTP server, RunPod worker, and the service that both share."""
