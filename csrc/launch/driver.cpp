#include "driver.hpp"

#include <stdexcept>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace layercache::launch {

namespace {

template <class Function>
void look_up(void* library, const char* name, Function*& found) {
#if defined(__unix__) || defined(__APPLE__)
    found = reinterpret_cast<Function*>(dlsym(library, name));
#endif
    if (!found) throw std::runtime_error(std::string("the CUDA driver has no ") + name);
}

}  // namespace

Driver Driver::open(const std::string& library) {
    void* handle = nullptr;
#if defined(__unix__) || defined(__APPLE__)
    handle = dlopen(library.c_str(), RTLD_NOW);  // never closed: torch holds it as well
#endif
    if (!handle) throw std::runtime_error("cannot load " + library);
    Driver driver;
    look_up(handle, "cuLaunchKernel", driver.launch);
    look_up(handle, "cuCtxGetDevice", driver.current_device);
    return driver;
}

bool Driver::is_current(int device) const {
    int found = -1;
    return current_device(&found) == 0 && found == device;
}

}  // namespace layercache::launch
