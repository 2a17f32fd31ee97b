"""What touches CUDA. Importing it needs neither a GPU nor cuda-bindings; `kvoffload.copy.choose` says whether there is one."""
