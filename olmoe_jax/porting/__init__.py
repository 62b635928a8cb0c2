"""Weights in and out: other programs' folders, read and written with nothing lost unsaid.

`families` has the name tables, `configs` the config files, `folders` and `safetensors` the files,
`sources` and `targets` the two ends of `port.port`, `reading` the way into memory, `verification`
what is checked afterwards.
"""
