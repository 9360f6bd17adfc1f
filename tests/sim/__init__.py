"""A GPU simulated on the CPU, for the tests; ``build`` compiles it."""
