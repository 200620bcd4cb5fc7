"""One file of data per architecture; importing the package files nothing, the registry discovers them."""
