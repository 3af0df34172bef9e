"""Second derivatives of an objective at a point: products, traces, eigenvalues."""
