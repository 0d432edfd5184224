// Runs one function of a library that TVM compiled, without Python: emulating one takes seconds.
//
//   harness LIBRARY FUNCTION RUNS IN OUT
//
// IN has all arguments, some of which the function writes to; OUT gets all of them after the last
// run. Both are rows of tensors: DLPack's type code, bits, number of dimensions as int32, sizes as
// int64, elements.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using namespace tvm::ffi;

constexpr DLDevice kHost{kDLCPU, 0};
constexpr size_t kAlignment = 64;  // compiled code uses loads that may fault on less

struct Allocator {
  void AllocData(DLTensor* tensor) {
    size_t size = (GetDataSize(*tensor) / kAlignment + 1) * kAlignment;
    tensor->data = std::aligned_alloc(kAlignment, size);
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

template <typename T>
T Get(std::istream& in) {
  T value{};
  in.read(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

template <typename T>
void Put(std::ostream& out, T value) {
  out.write(reinterpret_cast<const char*>(&value), sizeof value);
}

std::vector<Tensor> Read(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::vector<Tensor> tensors;
  while (in.peek() != std::char_traits<char>::eof()) {
    DLDataType type{};
    type.code = static_cast<uint8_t>(Get<int32_t>(in));
    type.bits = static_cast<uint8_t>(Get<int32_t>(in));
    type.lanes = 1;
    std::vector<int64_t> shape(Get<int32_t>(in));
    for (int64_t& size : shape) size = Get<int64_t>(in);
    Tensor tensor =
        Tensor::FromNDAlloc(Allocator(), ShapeView(shape.data(), shape.size()), type, kHost);
    in.read(static_cast<char*>(tensor.data_ptr()), GetDataSize(*tensor.GetDLTensorPtr()));
    if (!in) throw std::runtime_error(path + " is cut off or cannot be read");
    tensors.push_back(tensor);
  }
  return tensors;
}

void Write(const std::string& path, const std::vector<Tensor>& tensors) {
  std::ofstream out(path, std::ios::binary);
  for (const Tensor& tensor : tensors) {
    Put<int32_t>(out, tensor.dtype().code);
    Put<int32_t>(out, tensor.dtype().bits);
    Put<int32_t>(out, tensor.ndim());
    for (int i = 0; i < tensor.ndim(); ++i) Put<int64_t>(out, tensor.size(i));
    out.write(static_cast<const char*>(tensor.data_ptr()),
              GetDataSize(*tensor.GetDLTensorPtr()));
  }
  if (!out.flush()) throw std::runtime_error("cannot write " + path);
}

void Run(const std::string& library, const std::string& name, int runs, const std::string& in,
         const std::string& out) {
  Module module = Module::LoadFromFile(library);
  Function function = module->GetFunction(name).value();
  std::vector<Tensor> tensors = Read(in);
  std::vector<AnyView> arguments(tensors.begin(), tensors.end());
  Any result;
  for (int i = 0; i < runs; ++i) {
    function.CallPacked(PackedArgs(arguments.data(), arguments.size()), &result);
  }
  Write(out, tensors);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) {
    std::cerr << "usage: harness LIBRARY FUNCTION RUNS IN OUT\n";
    return 2;
  }
  try {
    Run(argv[1], argv[2], std::atoi(argv[3]), argv[4], argv[5]);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
