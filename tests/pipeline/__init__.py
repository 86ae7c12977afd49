"""The modules at the top of ``tsdsr_core``, against the published procedure, and on accelerators."""
