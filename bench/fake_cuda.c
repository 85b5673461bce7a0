// Stands in for libcuda.so.1: as much as Triton's driver and ours ask for. Nothing runs; launches are written down.
#include <stdint.h>
#include <string.h>

enum { MOST_LAUNCHES = 64, MOST_PARAMETERS = 300, MOST_KERNELS = 512 };

typedef struct {
    void* function;
    unsigned grid[3], block[3], shared;
    void* stream;
    uint64_t parameters[MOST_PARAMETERS];  // as many bytes of each as it has
} Launch;

static Launch launches[MOST_LAUNCHES];
static int count;
static struct {
    void* function;
    int parameters;
    unsigned char widths[MOST_PARAMETERS];
} kernels[MOST_KERNELS];
static int known;
static char context, module;
static uintptr_t functions;

int fake_count(void) { return count < MOST_LAUNCHES ? count : MOST_LAUNCHES; }
const Launch* fake_launch(int index) { return &launches[index]; }
void fake_forget(void) { count = 0; }

// Bytes of every parameter of a kernel, which a real driver knows from its binary.
void fake_expect(void* function, const int* widths, int parameters) {
    if (known == MOST_KERNELS || parameters > MOST_PARAMETERS) return;
    kernels[known].function = function;
    kernels[known].parameters = parameters;
    for (int k = 0; k < parameters; ++k) kernels[known].widths[k] = (unsigned char)widths[k];
    ++known;
}

static int note(void* function, const unsigned* grid, const unsigned* block, unsigned shared, void* stream,
                void** values) {
    if (count < MOST_LAUNCHES) {
        Launch* launch = &launches[count];
        memset(launch, 0, sizeof *launch);
        launch->function = function;
        memcpy(launch->grid, grid, sizeof launch->grid);
        memcpy(launch->block, block, sizeof launch->block);
        launch->shared = shared;
        launch->stream = stream;
        for (int kernel = 0; kernel < known; ++kernel)
            if (kernels[kernel].function == function)
                for (int k = 0; k < kernels[kernel].parameters; ++k)
                    memcpy(&launch->parameters[k], values[k], kernels[kernel].widths[k]);
    }
    ++count;
    return 0;
}

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** values, void** extra) {
    const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    (void)extra;
    return note(function, grid, block, shared, stream, values);
}

typedef struct {
    unsigned grid[3], block[3], shared;
    void* stream;
    void* attributes;
    unsigned number;
} Config;

int cuLaunchKernelEx(const Config* config, void* function, void** values, void** extra) {
    (void)extra;
    return note(function, config->grid, config->block, config->shared, config->stream, values);
}

int cuModuleLoadData(void** found, const void* image) { return (void)image, *found = &module, 0; }
int cuModuleGetFunction(void** found, void* owner, const char* name) {
    (void)owner, (void)name;
    return *found = (void*)(functions += 16), 0;
}
int cuCtxGetCurrent(void** found) { return *found = &context, 0; }
static int current;
void fake_use(int device) { current = device; }
int cuCtxGetDevice(int* device) { return *device = current, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) { return (void)attribute, (void)device, *value = 232448, 0; }
int cuFuncGetAttribute(int* value, int attribute, void* function) {
    (void)function;
    *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0;  // most threads of a block, registers, bytes of memory
    return 0;
}
int cuPointerGetAttribute(void* found, int attribute, uint64_t pointer) {
    (void)attribute;
    memcpy(found, &pointer, sizeof pointer);
    return 0;
}
int cuGetErrorString(int error, const char** text) { return (void)error, *text = "an error", 0; }
int cuStreamIsCapturing(void* stream, int* state) { return (void)stream, *state = 0, 0; }

// Never reached by a launch, but Triton's driver does not load without them.
int cuInit(unsigned flags) { return (void)flags, 0; }
#define STUB(name) \
    int name(void) { return 0; }
STUB(cuCtxGetLimit)
STUB(cuCtxSetCurrent)
STUB(cuCtxSetLimit)
STUB(cuDevicePrimaryCtxRetain)
STUB(cuDriverGetVersion)
STUB(cuFuncSetAttribute)
STUB(cuFuncSetCacheConfig)
STUB(cuModuleUnload)
STUB(cuOccupancyMaxActiveClusters)
STUB(cuPointerGetAttributes)
STUB(cuTensorMapEncodeIm2col)
STUB(cuTensorMapEncodeTiled)
