"""Serving: the HTTP server, the RunPod worker, and the service that both share."""
