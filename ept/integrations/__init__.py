"""EPT models inside other programs; each file needs the package that it is named after."""
