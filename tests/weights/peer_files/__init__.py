"""Files of BEiT as other libraries write them, built live, and what becomes of each.

`table` has a row for every file; `table_test` runs them, and `readers_test` takes every container
through every entry point. The libraries run in a process of their own, `peer`.
"""
