"""From corpora to batches: readers, tokenizer, prepared data, the input pipeline.

`corpora` reads documents from files and `embedded` makes them from what is installed; `preparation`
tokenises and packs them into a directory that `pipeline.open` serves, window by window or as
shuffled batches.
"""
