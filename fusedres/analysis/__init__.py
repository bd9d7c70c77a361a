"""Studies of residual networks: gradients, depth, Jacobians, cost, memory traffic, and the link to ODEs.

Each is a function that returns plain data, and a command of ``python -m fusedres`` that prints and plots it.
"""
