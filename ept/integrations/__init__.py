"""Other people's programs with EPT models in them; each file needs the package that it is named after."""
