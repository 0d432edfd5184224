// Runs an exported network without Python.
//
//   run lib.so [options] input0.npy input1.npy ...
//
// writes output0.npy, output1.npy, ... Options:
//   --out PREFIX   write PREFIX0.npy, ... instead
//   --repeat N     run N times more, and print the shortest and the median time
//
// Needs TVM's runtime alone: libtvm_runtime.so, libtvm_runtime_extra.so and libtvm_ffi.so of the
// wheels apache-tvm and apache-tvm-ffi. docs/arm.md shows how to compile it. The environment
// variable TVM_NUM_THREADS sets the number of threads.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

namespace {

constexpr int kPooledAllocator = 2;
constexpr size_t kAlignment = 64;  // compiled networks load whole vectors

struct Allocator {
  void AllocData(DLTensor* tensor) {
    const size_t bytes = ffi::GetDataSize(*tensor);
    tensor->data = aligned_alloc(kAlignment, (bytes / kAlignment + 1) * kAlignment);
    if (tensor->data == nullptr) throw std::runtime_error("out of memory");
  }
  void FreeData(DLTensor* tensor) { free(tensor->data); }
};

// The letters of NumPy's kinds of numbers.
int DtypeCode(char kind) {
  switch (kind) {
    case 'f': return kDLFloat;
    case 'i': return kDLInt;
    case 'u': return kDLUInt;
    case 'b': return kDLBool;
    default: throw std::runtime_error(std::string("no such kind of number: ") + kind);
  }
}

char KindLetter(int code) {
  for (char kind : {'f', 'i', 'u', 'b'}) {
    if (DtypeCode(kind) == code) return kind;
  }
  throw std::runtime_error("the network returns numbers that NumPy has not");
}

// What follows `'key':` in the header of a .npy file.
std::string Field(const std::string& header, const std::string& key) {
  const size_t at = header.find("'" + key + "'");
  const size_t colon = at == std::string::npos ? at : header.find(':', at);
  if (colon == std::string::npos) throw std::runtime_error("no " + key + " in its header");
  return header.substr(header.find_first_not_of(' ', colon + 1));
}

std::vector<int64_t> Shape(const std::string& text) {
  std::vector<int64_t> shape;
  const std::string inside = text.substr(1, text.find(')') - 1);
  for (const char* at = inside.c_str(); *at != '\0';) {
    if (*at < '0' || *at > '9') {
      ++at;
      continue;
    }
    char* end = nullptr;
    shape.push_back(std::strtoll(at, &end, 10));
    at = end;
  }
  return shape;
}

ffi::Tensor Load(const std::string& path) try {
  std::ifstream file(path, std::ios::binary);
  char magic[8];
  if (!file.read(magic, sizeof magic)) throw std::runtime_error("cannot be read");
  if (std::memcmp(magic, "\x93NUMPY\x01", 7) != 0) throw std::runtime_error("is no .npy file");
  uint16_t length = 0;
  file.read(reinterpret_cast<char*>(&length), sizeof length);
  std::string header(length, ' ');
  file.read(header.data(), length);
  const std::string descr = Field(header, "descr");
  if (descr.size() < 4 || descr[1] == '>') throw std::runtime_error("has an unknown dtype");
  if (Field(header, "fortran_order").rfind("False", 0) != 0) {
    throw std::runtime_error("is in Fortran order");
  }
  const auto bits = static_cast<uint8_t>(8 * std::stoi(descr.substr(3)));
  const DLDataType dtype{static_cast<uint8_t>(DtypeCode(descr[2])), bits, 1};
  const std::vector<int64_t> shape = Shape(Field(header, "shape"));
  const ffi::ShapeView view(shape.data(), shape.size());
  ffi::Tensor tensor = ffi::Tensor::FromNDAlloc(Allocator(), view, dtype, DLDevice{kDLCPU, 0});
  const auto bytes = static_cast<std::streamsize>(ffi::GetDataSize(*tensor.GetDLTensorPtr()));
  if (!file.read(static_cast<char*>(tensor.data_ptr()), bytes)) {
    throw std::runtime_error("is too short");
  }
  return tensor;
} catch (const std::exception& error) {
  throw std::runtime_error(path + " " + error.what());
}

void Save(const std::string& path, const ffi::Tensor& tensor) {
  std::string shape;
  for (int i = 0; i < tensor.ndim(); ++i) shape += std::to_string(tensor.size(i)) + ",";
  const DLDataType dtype = tensor.dtype();
  const int bytes = dtype.bits / 8;
  std::string header = std::string("{'descr': '") + (bytes == 1 ? '|' : '<') +
                       KindLetter(dtype.code) + std::to_string(bytes) +
                       "', 'fortran_order': False, 'shape': (" + shape + "), }";
  while ((10 + header.size() + 1) % 64 != 0) header += ' ';
  header += '\n';
  const auto length = static_cast<uint16_t>(header.size());
  std::ofstream file(path, std::ios::binary);
  file.write("\x93NUMPY\x01\x00", 8);
  file.write(reinterpret_cast<const char*>(&length), sizeof length);
  file << header;
  file.write(static_cast<const char*>(tensor.data_ptr()),
             static_cast<std::streamsize>(ffi::GetDataSize(*tensor.GetDLTensorPtr())));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

struct Options {
  std::string path, prefix = "output";
  int repeat = 0;
  std::vector<std::string> inputs;
};

Options Parse(const std::vector<std::string>& words) {
  Options options;
  for (size_t i = 0; i < words.size(); ++i) {
    const bool takes_value = words[i] == "--out" || words[i] == "--repeat";
    if (takes_value && i + 1 == words.size()) throw std::runtime_error(words[i] + " of what?");
    if (words[i] == "--out") {
      options.prefix = words[++i];
    } else if (words[i] == "--repeat") {
      options.repeat = std::stoi(words[++i]);
    } else if (options.path.empty()) {
      options.path = words[i];
    } else {
      options.inputs.push_back(words[i]);
    }
  }
  if (options.path.empty()) {
    throw std::runtime_error("usage: run lib.so [--out PREFIX] [--repeat N] input0.npy ...");
  }
  // The system's loader would look for a bare name in its own folders.
  if (options.path.find('/') == std::string::npos) options.path = "./" + options.path;
  return options;
}

void Time(const ffi::Function& main, const std::vector<ffi::AnyView>& arguments, int repeat) {
  std::vector<double> times;
  for (int i = 0; i < repeat; ++i) {
    const auto began = std::chrono::steady_clock::now();
    ffi::Any result;
    main.CallPacked(ffi::PackedArgs(arguments.data(), arguments.size()), &result);
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - began;
    times.push_back(took.count());
  }
  std::sort(times.begin(), times.end());
  std::printf("shortest %.3f ms, median %.3f ms of %d\n", times[0], times[times.size() / 2], repeat);
}

int Run(const Options& options) {
  std::vector<ffi::Tensor> inputs;
  for (const std::string& path : options.inputs) inputs.push_back(Load(path));
  ffi::Module library = ffi::Module::LoadFromFile(options.path);
  ffi::Module machine = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  machine->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, kPooledAllocator);
  const ffi::Function main = machine->GetFunction("main").value();
  const std::vector<ffi::AnyView> arguments(inputs.begin(), inputs.end());
  ffi::Any result;
  main.CallPacked(ffi::PackedArgs(arguments.data(), arguments.size()), &result);
  if (auto one = result.as<ffi::Tensor>()) {
    Save(options.prefix + "0.npy", *one);
  } else {
    int number = 0;
    for (const ffi::Any& output : result.cast<ffi::Array<ffi::Any>>()) {
      Save(options.prefix + std::to_string(number++) + ".npy", output.cast<ffi::Tensor>());
    }
  }
  if (options.repeat > 0) Time(main, arguments, options.repeat);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return Run(Parse(std::vector<std::string>(argv + 1, argv + argc)));
  } catch (const ffi::Error& error) {
    std::cerr << error.what() << "\n";
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
  }
  return 1;
}
