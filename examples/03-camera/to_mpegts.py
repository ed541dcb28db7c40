"""Write a video to standard output as MPEG-TS, as a camera's encoder does: python to_mpegts.py VIDEO | …"""

import sys

import av

with av.open(sys.argv[1]) as video, av.open(sys.stdout.buffer, "w", format="mpegts") as pipe:
    stream = pipe.add_stream_from_template(video.streams.video[0])
    for packet in video.demux(video=0):
        if packet.size:
            packet.stream = stream
            pipe.mux(packet)
