"""How speed is measured: contestants in turn, medians and spreads, memory, and who else was there.

`rounds` compares, `processes` watches processes and the machine, `page_cache` puts files in a known
state, `tables` prints; each other module is one suite of `experiments.benchmark` (`SUITES` there
names them all).
"""
