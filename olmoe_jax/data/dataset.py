"""The TFDS dataset of fixed windows: feature `tokens`, and for every token its document and domain.

Written as array_record, which TFDS writes and reads without TensorFlow. Features are fixed-shape
Tensors: TFDS decodes a `Sequence` an order of magnitude slower.
"""

import contextlib
import functools
import io
import itertools
import pathlib

import numpy as np
import tensorflow_datasets as tfds

VERSION = "1.0.0"
NAME = "prepared_corpus"
# Of arrays, before compression; TFDS holds the windows of one shard while it counts them.
SHARD_BYTES = 64 << 20
BYTES_PER_TOKEN = 4 + 4 + 1  # tokens, documents, domains


class PreparedCorpus(tfds.core.ShardBasedBuilder):
    """Windows in corpus order, written shard by shard: memory does not grow with the corpus.

    (`GeneratorBasedBuilder` would keep the first gigabyte of a split in memory to shuffle it; the
    pipeline shuffles when it reads.)
    """

    VERSION = tfds.core.Version(VERSION)
    name = NAME
    # TFDS looks there for checksums of downloads, with a module that may not be installed
    code_path = None

    def __init__(self, *, sequence_length, splits, **kwargs):
        """`splits`: {name: (number of windows, function that returns an iterator over them)}."""
        self._sequence_length, self._splits = sequence_length, splits
        super().__init__(**kwargs)

    def _info(self):
        shape = (self._sequence_length,)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Windows of tokens with the document and domain of each.",
            features=tfds.features.FeaturesDict(
                {
                    "tokens": tfds.features.Tensor(shape=shape, dtype=np.int32),
                    "documents": tfds.features.Tensor(shape=shape, dtype=np.int32),
                    "domains": tfds.features.Tensor(shape=shape, dtype=np.uint8),
                }
            ),
        )

    def _shard_iterators_per_split(self, dl_manager):
        del dl_manager
        per_shard = max(1, SHARD_BYTES // (self._sequence_length * BYTES_PER_TOKEN))
        shards = {}
        for split, (num_windows, windows) in self._splits.items():
            if num_windows:
                stream = iter(windows())  # shards are written in order, so all draw from one stream
                numbered = zip(itertools.count(), stream)
                count = -(-num_windows // per_shard)
                shards[split] = [functools.partial(itertools.islice, numbered, per_shard)] * count
        return shards


def write(directory, *, sequence_length, splits) -> pathlib.Path:
    """Writes the dataset below `directory` and returns the folder that `read` takes."""
    builder = PreparedCorpus(
        data_dir=str(directory),
        file_format="array_record",
        sequence_length=sequence_length,
        splits=splits,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download; there is none
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    return folder(directory)


def folder(directory) -> pathlib.Path:
    """Where below `directory` TFDS puts the dataset."""
    return pathlib.Path(directory) / NAME / VERSION


def read(directory, split):
    """Random-access source of one split's windows: dicts of NumPy arrays."""
    return tfds.builder_from_directory(str(folder(directory))).as_data_source(split)
