"""A libvirtd of one's own and the guests that the tests, the demo and the benchmarks run in it."""
