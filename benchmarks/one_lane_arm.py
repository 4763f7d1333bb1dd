"""giong with its passes one after the other, in a process of its own: `python one_lane_arm.py JOB RESULT`."""

from __future__ import annotations

import giong_arm

from giong.sizing import lanes

if __name__ == "__main__":
    lanes.MAX_LANES = 1
    giong_arm.main()
