/* A camera at /dev/video99 for a process that preloads this: cc -shared -fPIC v4l2.c -ldl

   64×48 YUYV of one gray, whose level is the picture's number; 25 pictures a second by this machine's clock. The
   environment says after how many it falls silent (FAKE_SILENT), is unplugged (FAKE_UNPLUGGED) or is unplugged for a moment
   (FAKE_CUT), and whether somebody else has it (FAKE_BUSY). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/videodev2.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { WIDTH = 64, HEIGHT = 48, SIZE = 2 * WIDTH * HEIGHT, PAGE = 8192, BUFFERS = 8, MICROSECONDS = 40000 };

static int camera = -1;
static unsigned char *memory;
static long pictures, began;
static int queue[BUFFERS], queued;

static long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static long limit(const char *name) {
    const char *value = getenv(name);
    return value ? atol(value) : 1L << 40;
}

static int fail(int error) {
    errno = error;
    return -1;
}

static int open_camera(void) {
    if (getenv("FAKE_BUSY"))
        return fail(EBUSY);
    if (pictures >= limit("FAKE_UNPLUGGED"))
        return fail(ENOENT);
    camera = memfd_create("camera", 0);
    if (ftruncate(camera, BUFFERS * PAGE))
        return -1;
    memory = mmap(NULL, BUFFERS * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, camera, 0);
    pictures += pictures == limit("FAKE_CUT");
    queued = 0, began = now() - pictures * MICROSECONDS;
    return camera;
}

static int give(struct v4l2_buffer *buffer) {
    if (pictures >= limit("FAKE_UNPLUGGED") || pictures == limit("FAKE_CUT"))
        return fail(ENODEV);
    if (!queued || pictures >= limit("FAKE_SILENT") || now() < began + pictures * MICROSECONDS)
        return fail(EAGAIN);
    buffer->index = queue[0];
    memmove(queue, queue + 1, --queued * sizeof *queue);
    for (int i = 0; i < SIZE; i += 2) {
        memory[buffer->index * PAGE + i] = 16 + pictures % 200;
        memory[buffer->index * PAGE + i + 1] = 128;
    }
    long time = began + pictures++ * MICROSECONDS;
    buffer->bytesused = SIZE;
    buffer->flags = V4L2_BUF_FLAG_TIMESTAMP_MONOTONIC;
    buffer->timestamp.tv_sec = time / 1000000, buffer->timestamp.tv_usec = time % 1000000;
    return 0;
}

static void describe(struct v4l2_pix_format *format) {
    format->width = WIDTH, format->height = HEIGHT, format->pixelformat = V4L2_PIX_FMT_YUYV;
    format->field = V4L2_FIELD_NONE, format->bytesperline = 2 * WIDTH, format->sizeimage = SIZE;
}

static int answer(unsigned long request, void *data) {
    struct v4l2_buffer *buffer = data;
    switch (request) {
    case VIDIOC_QUERYCAP:
        ((struct v4l2_capability *)data)->capabilities = V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_STREAMING;
        return 0;
    case VIDIOC_G_INPUT: *(int *)data = 0; return 0;
    case VIDIOC_S_INPUT: return 0;
    case VIDIOC_ENUMINPUT: return ((struct v4l2_input *)data)->index ? fail(EINVAL) : 0;
    case VIDIOC_G_FMT:
    case VIDIOC_S_FMT: describe(&((struct v4l2_format *)data)->fmt.pix); return 0;
    case VIDIOC_G_PARM: {
        struct v4l2_fract *period = &((struct v4l2_streamparm *)data)->parm.capture.timeperframe;
        period->numerator = 1, period->denominator = 25;
        return 0;
    }
    case VIDIOC_REQBUFS: ((struct v4l2_requestbuffers *)data)->count = BUFFERS; return 0;
    case VIDIOC_QUERYBUF:
        buffer->length = PAGE, buffer->m.offset = buffer->index * PAGE;
        return 0;
    case VIDIOC_QBUF:
        if (queued == BUFFERS)
            return fail(EINVAL); // of a camera that was closed before
        queue[queued++] = buffer->index;
        return 0;
    case VIDIOC_DQBUF: return give(buffer);
    case VIDIOC_STREAMON:
    case VIDIOC_STREAMOFF: return 0;
    default: return fail(ENOTTY);
    }
}

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        int mode = va_arg(more, int);                                                                                  \
        va_end(more);                                                                                                  \
        if (!strcmp(path, "/dev/video99"))                                                                             \
            return open_camera();                                                                                      \
        return ((int (*)(const char *, int, int))dlsym(RTLD_NEXT, #name))(path, flags, mode);                          \
    }
OPEN(open)
OPEN(open64)

int ioctl(int file, unsigned long request, ...) {
    va_list more;
    va_start(more, request);
    void *data = va_arg(more, void *);
    va_end(more);
    if (file == camera && camera >= 0)
        return answer(request & 0xFFFFFFFF, data);
    return ((int (*)(int, unsigned long, void *))dlsym(RTLD_NEXT, "ioctl"))(file, request, data);
}
