#include <fovea/error.h>

#include <cstdint>
#include <memory>
#include <sstream>
#include <string>

#include "files/safetensors.h"
#include "tools/npy.h"

/// Whatever the bytes, the readers of tensor files return or throw Error, and what they return can be read to its end.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  std::uint8_t sum = 0;
  const auto touch = [&](const fovea::files::OwnedTensor& tensor) {
    for (const std::byte byte : tensor.bytes()) sum ^= static_cast<std::uint8_t>(byte);
  };
  try {
    const fovea::files::SafetensorsFile file(std::make_unique<std::istringstream>(bytes), size, "fuzz");
    for (const auto& [name, entry] : file.entries()) {
      try {
        touch(file.load(name));
      } catch (const fovea::Error&) {
      }
    }
  } catch (const fovea::Error&) {
  }
  try {
    std::istringstream stream(bytes);
    touch(fovea::tools::read_npy(stream, size, "fuzz"));
  } catch (const fovea::Error&) {
  }
  volatile std::uint8_t seen = sum;
  static_cast<void>(seen);
  return 0;
}
