# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Worker processes that do not outlive the process that started them."""

import os
import threading
import time


def end_with_parent(parent: int, worker: int = 0) -> None:
    """End this worker soon after its parent, with process id `parent`, is killed.

    It would otherwise wait forever for work.  PyTorch checks this only between two samples: a worker at
    Streaming's barrier waits for the workers of another killed rank, and keeps its memory.
    """
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name=f'end_with_parent_{worker}', daemon=True).start()
