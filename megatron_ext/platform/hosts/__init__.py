"""Starts a run on several hosts: who hosts the rendezvous, which interface leads there, who cannot be reached."""
