"""Starts a run on several hosts: finds the host of the rendezvous, the network interface, and unreachable hosts."""
