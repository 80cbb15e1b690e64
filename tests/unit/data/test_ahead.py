"""Bytes of remote pools: as few requests as promised, and not one other byte in a batch."""

from __future__ import annotations

import hashlib
import io
import tarfile

import numpy as np
import pytest
from object_store import client, upload

from raysemi.data.ahead import Ahead
from raysemi.data.joined import JoinedPool
from raysemi.data.loader import DataConfig, Stream
from raysemi.data.order import Order
from raysemi.data.pool import Pool, Shard, write_index
from raysemi.data.reader import Reader
from raysemi.data.store import StoreConfig, open_store
from raysemi.errors import DataError, DataFailure
from tests.unit.data.test_loader import assert_same
