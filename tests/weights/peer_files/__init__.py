"""Files of BEiT as other libraries write them, built live, and what becomes of each.

`table` has a row for every file; `table_test` runs them, `readers_test` takes every container
through every entry point, and `fuzz_test` varies configs and headers. The libraries run in a
process of their own, `peer`.
"""
