"""Search methods compared at equal evaluation cost, on problems with a known optimum and on recorded fine-tunes."""
