// The CUDA runtime for the same device: its memory is the CPU's, and it does all things at once.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

using Graph = std::vector<std::function<void()>>;
extern "C" {
extern void emulated_record(Graph* graph);
static Graph* captured;

int cudaDeviceGetAttribute(int* v, int what, int) {
  switch (what) {
    case 1: case 2: case 3: case 4: *v = 1024; break;      // threads of a block, and its extents
    case 5: case 6: case 7: *v = 65535; break;             // blocks
    case 8: *v = 48 << 10; break;                          // shared memory of a block
    case 10: *v = 32; break;                               // warp
    case 13: *v = 1500000; break;                          // clock, kHz
    case 16: *v = 4; break;                                // multiprocessors
    case 75: *v = 9; break;                                // compute capability
    case 76: *v = 0; break;
    default: *v = 1 << 16;
  }
  return 0;
}
int cudaGetDeviceCount(int* n) { *n = 1; return 0; }
int cudaGetDevice(int* d) { *d = 0; return 0; }
int cudaSetDevice(int) { return 0; }
int cudaGetDeviceProperties(void* p, int) { memset(p, 0, 512); return 0; }
const char* cudaGetErrorName(int) { return "error"; }
const char* cudaGetErrorString(int) { return "an error"; }
int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }
int cudaMalloc(void** p, size_t n) {
  *p = aligned_alloc(256, (n + 511) / 256 * 256);
  memset(*p, 0xff, n);  // NaN: what nobody wrote must not look like a result
  return 0;
}
int cudaFree(void* p) { free(p); return 0; }
int cudaMallocHost(void** p, size_t n) { return cudaMalloc(p, n); }
int cudaFreeHost(void* p) { free(p); return 0; }
int cudaMemGetInfo(size_t* a, size_t* b) { *a = *b = size_t(1) << 34; return 0; }
int cudaMemcpyAsync(void* to, const void* from, size_t n, int, void*) {
  if (captured) captured->push_back([=] { memcpy(to, from, n); }); else memcpy(to, from, n);
  return 0;
}
int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, void*) {
  memcpy(to, from, n);
  return 0;
}
int cudaStreamCreate(void** s) { *s = nullptr; return 0; }
int cudaStreamCreateWithFlags(void** s, unsigned) { *s = nullptr; return 0; }
int cudaStreamDestroy(void*) { return 0; }
int cudaStreamSynchronize(void*) { return 0; }
int cudaStreamWaitEvent(void*, void*, unsigned) { return 0; }
int cudaStreamBeginCapture(void*, int) { captured = new Graph; emulated_record(captured); return 0; }
int cudaStreamEndCapture(void*, void** g) { *g = captured; captured = nullptr; emulated_record(nullptr); return 0; }
int cudaGraphInstantiate(void** e, void* g, unsigned long long) { *e = new Graph(*static_cast<Graph*>(g)); return 0; }
int cudaGraphLaunch(void* e, void*) { for (auto& work : *static_cast<Graph*>(e)) work(); return 0; }
int cudaGraphDestroy(void* g) { delete static_cast<Graph*>(g); return 0; }
int cudaGraphExecDestroy(void* e) { delete static_cast<Graph*>(e); return 0; }
int cudaEventCreate(void** e) { *e = nullptr; return 0; }
int cudaEventDestroy(void*) { return 0; }
int cudaEventRecord(void*, void*) { return 0; }
int cudaEventSynchronize(void*) { return 0; }
int cudaEventElapsedTime(float* ms, void*, void*) { *ms = 1; return 0; }
}
