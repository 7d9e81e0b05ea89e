"""Keys under `model:` of the families other than the decoder, one file each."""
