// The functions of the CUDA driver and runtime that TVM calls, for a device that is this CPU.
// A module's image is the path of a shared library, made by `cuda_emulator.py`.
#include <dlfcn.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

namespace {
struct Kernel {
  void (*run)(void**, const unsigned*);
  const int* sizes;  // bytes of each argument, then 0
};
struct Config {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned count;
};
using Graph = std::vector<std::function<void()>>;
Graph* recording = nullptr;
void now(std::function<void()> work) {
  if (recording) recording->push_back(work); else work();
}
}  // namespace

extern "C" {
void emulated_record(Graph* graph) { recording = graph; }
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* v) { *v = 13000; return 0; }
int cuDeviceGetCount(int* n) { *n = 1; return 0; }
int cuDeviceGet(int* d, int) { *d = 0; return 0; }
int cuDeviceGetAttribute(int* v, int what, int) { *v = what == 75 ? 9 : 0; return 0; }
int cuDeviceGetName(char* name, int size, int) { snprintf(name, size, "emulated GPU"); return 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuGetErrorName(int, const char** t) { *t = "error"; return 0; }
int cuGetErrorString(int, const char** t) { *t = "an error"; return 0; }
int cuModuleLoadData(void** module, const void* image) {
  *module = dlopen(static_cast<const char*>(image), RTLD_NOW | RTLD_LOCAL);
  if (!*module) fprintf(stderr, "%s\n", dlerror());
  return *module ? 0 : 200;
}
int cuModuleUnload(void*) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  char symbol[512];
  snprintf(symbol, sizeof symbol, "emulated_%s", name);
  *function = dlsym(module, symbol);
  return *function ? 0 : 500;
}
int cuLaunchKernelEx(const Config* c, void* function, void** args, void**) {
  const Kernel* kernel = static_cast<const Kernel*>(function);
  std::vector<unsigned> size{c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2]};
  if (size[3] * size[4] * size[5] > 1024 || c->shared > (227u << 10)) return 701;
  std::vector<std::vector<char>> values;
  for (int n = 0; kernel->sizes[n]; ++n) {
    const char* at = static_cast<const char*>(args[n]);
    values.emplace_back(at, at + kernel->sizes[n]);
  }
  now([=]() mutable {
    std::vector<void*> pointers;
    for (auto& v : values) pointers.push_back(v.data());
    kernel->run(pointers.data(), size.data());
  });
  return 0;
}
int cuTensorMapEncodeTiled(void) { return 801; }
}
