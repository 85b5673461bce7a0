// The two functions of the CUDA driver that a launch needs; looked up at run time, so nothing is linked with CUDA.
#pragma once

#include <string>

namespace layercache::launch {

struct Driver {
    int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                  unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra) = nullptr;
    int (*current_device)(int* device) = nullptr;

    // Throws std::runtime_error where the library or one of its functions is missing.
    static Driver open(const std::string& library);

    // Whether the calling thread's context is that of the device.
    bool is_current(int device) const;
};

}  // namespace layercache::launch
