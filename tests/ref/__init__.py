"""Independent references in numpy: the specification written a second time. Nothing here imports ``deepcalm``."""
