"""Starts a run on several hosts: finds the rendezvous host, chooses the network interface, names unreachable hosts."""
