"""DSA operators on tensors and pages. Importing this package loads no back end: see `kernels.dispatch`."""
