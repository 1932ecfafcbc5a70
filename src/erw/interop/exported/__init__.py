"""What an exported folder holds besides weights: code that needs torch and diffusers alone.

`pipeline.py` goes into the folder as it is, `transformer.py` together with the modules of ours that
it stands on (see `erw.interop.bundle`).
"""
