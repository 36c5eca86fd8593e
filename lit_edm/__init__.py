"""Fine-tunes SDXL and Playground v2.5 by the design space of Karras et al. (2022), as Lightning modules."""

__version__ = "0.1.0"
