"""``python -m tools.gpu``: everything that needs a GPU, in one command, on a machine that may have no network.

It needs no virtual environment of ours: it takes the machine's Python with whatever torch, Triton, nvcc and pytest are
there, and says what is missing. Nothing here imports torch or fusedres in its own process, for these are what is on
trial; every stage runs in processes of its own with a time limit, and a stage that fails or hangs stops no later one.
``docs/gpu.md`` has the stages, the files that it writes, and how to read them.
"""
