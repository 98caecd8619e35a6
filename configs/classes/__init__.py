"""Names of the classes of data sets, one file for each: `CLASSES`."""
