"""A deterministic simulation of several processes over models of Redis and a database.

The stacks are the shipped code, down to the Lua scripts. Only the two servers, the network and time
are models. ``python -m tests.simulation --seeds 1000`` runs it; ``--replay SEED`` shows one run.
"""
