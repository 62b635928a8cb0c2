"""Upcycling: the weights of a dense model as the beginning of a Mixture of Experts.

`recipe` says what is made and whether it computes what the dense model did, `weights` makes every
array, `states` reads and writes whole train states, `upcycle.upcycle` goes from directory to
directory.
"""
