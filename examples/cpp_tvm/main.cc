// app <artifact folder> <images.f32> [--threads N]: the predicted label of every image, one a line.
//
// images.f32 holds images in the network's layout (NCHW), float32, little-endian, one after the other.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <stdexcept>
#include <string>
#include <vector>

#include "network.h"

namespace {

std::vector<float> read_floats(const std::string& path, std::size_t of) {
  const std::size_t bytes = std::filesystem::file_size(path);  // throws with the path and what is wrong
  if (bytes == 0 || bytes % (of * sizeof(float)) != 0) {
    throw std::runtime_error(path + ": " + std::to_string(bytes) + " bytes, and a call takes " +
                             std::to_string(of * sizeof(float)) + "; write whole images of the network's size");
  }
  std::vector<float> floats(bytes / sizeof(float));
  std::ifstream file(path, std::ios::binary);
  if (!file.read(reinterpret_cast<char*>(floats.data()), static_cast<std::streamsize>(bytes))) {
    throw std::runtime_error(path + ": cannot be read");
  }
  return floats;
}

// Labels of the calls [begin, end), each of a batch of images.
void classify(crossbit::Network& network, const std::vector<float>& images, std::size_t begin, std::size_t end,
              std::vector<int>& labels) {
  const std::size_t batch = crossbit::manifest::kOutputShape[0];
  const std::size_t classes = network.output_size() / batch;
  std::vector<float> scores(network.output_size());
  for (std::size_t call = begin; call < end; ++call) {
    network.run(&images[call * network.input_size()], network.input_size(), scores.data(), scores.size());
    for (std::size_t i = 0; i < batch; ++i) {
      const auto first = scores.begin() + static_cast<std::ptrdiff_t>(i * classes);
      labels[call * batch + i] = static_cast<int>(std::max_element(first, first + classes) - first);
    }
  }
}

void run(const std::string& folder, const std::string& file, std::size_t threads) {
  std::vector<crossbit::Network> networks;  // one a thread, all on one loaded library
  networks.emplace_back(folder);
  while (networks.size() < threads) networks.push_back(networks.front().another());

  const std::vector<float> images = read_floats(file, crossbit::Network::input_size());
  const std::size_t calls = images.size() / crossbit::Network::input_size();
  std::vector<int> labels(calls * crossbit::manifest::kOutputShape[0]);
  std::vector<std::future<void>> parts;
  for (std::size_t t = 0; t < threads; ++t) {
    parts.push_back(std::async(std::launch::async, [&, t] {
      classify(networks[t], images, calls * t / threads, calls * (t + 1) / threads, labels);
    }));
  }
  for (std::future<void>& part : parts) part.get();  // throws what its thread threw
  for (int label : labels) std::printf("%d\n", label);
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const bool threaded = arguments.size() == 4 && arguments[2] == "--threads";
  const long threads = threaded ? std::strtol(arguments[3].c_str(), nullptr, 10) : 1;
  if ((arguments.size() != 2 && !threaded) || threads < 1 || threads > 1024) {
    std::fprintf(stderr, "usage: %s <artifact folder> <images.f32> [--threads N]\n", argv[0]);
    return 2;
  }
  try {
    run(arguments[0], arguments[1], static_cast<std::size_t>(threads));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
