"""Depth of very many photos on one machine or a cluster, with Ray Data."""
