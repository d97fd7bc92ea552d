"""A worker whose decoder does what the text of a file says: what a library's fault could do."""

import os
import signal
import time

from PIL import Image

from fastgan.data import worker
from fastgan.data.dali_decoder import DaliDecoder
from fastgan.data.pillow_decoder import PillowDecoder

decode_one, image_open = PillowDecoder.decode_one, Image.open
header = DaliDecoder._header


def obey(self, blob):
    match blob:
        case b"crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case b"spin":
            while True:
                pass
        case b"wait":
            time.sleep(1000)
        case b"exit":
            os._exit(3)
        case b"print":
            os.write(1, b"to stdout\n" * 100)
            os.write(2, b"to stderr\n" * 100)
        case b"fault":
            raise ZeroDivisionError("a mistake of ours")
    return decode_one(self, blob.removeprefix(b"crash, but for Pillow"))


def obey_header(self, blob):
    if blob.startswith(b"crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return header(self, blob)


def open_image(file, **options):
    if file.getvalue() == b"memory":
        bytearray(16 << 30)
    return image_open(file, **options)


if __name__ == "__main__":
    match os.environ.get("BAD_WORKER"):
        case "start crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "start error":
            worker.open_decoder = None
    PillowDecoder.decode_one = obey
    DaliDecoder._header = obey_header
    Image.open = open_image
    worker.main()
