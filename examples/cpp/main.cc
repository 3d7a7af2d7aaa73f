// Classify images: classify FILE [THREADS]. FILE holds raw float32 images, one after the other; a label a line.
// First every thread classifies images of its own, then all threads that the network was compiled for share each call.
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include "network.h"

static std::vector<Network::Image> read(const std::string &path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + " cannot be read");
  std::vector<Network::Image> images;
  Network::Image image;
  while (file.read(reinterpret_cast<char *>(image.data()), sizeof image)) images.push_back(image);
  if (file.gcount() != 0) throw std::runtime_error(path + " ends inside an image");
  return images;
}

// Every thread has a network, that is a workspace, of its own.
static std::vector<int> one_image_a_thread(const std::vector<Network::Image> &images, std::size_t threads) {
  std::vector<int> labels(images.size());
  std::vector<std::exception_ptr> errors(threads);
  std::vector<std::thread> running;
  for (std::size_t t = 0; t < threads; ++t)
    running.emplace_back([&, t] {
      try {
        Network network;
        for (std::size_t i = t; i < images.size(); i += threads) labels[i] = network.label(images[i]);
      } catch (...) {
        errors[t] = std::current_exception();
      }
    });
  for (std::thread &thread : running) thread.join();
  for (const std::exception_ptr &error : errors)
    if (error) std::rethrow_exception(error);
  return labels;
}

// All threads work on one image: less time for it, if its layers are large enough to be shared.
static std::vector<int> all_threads_an_image(const std::vector<Network::Image> &images) {
  const Pool pool(DIGITS_WORKERS);
  Network network(&pool);
  std::vector<int> labels;
  for (const Network::Image &image : images) labels.push_back(network.label(image));
  return labels;
}

int main(int argc, char **argv) try {
  if (argc < 2 || argc > 3) {
    std::cerr << "usage: " << argv[0] << " FILE [THREADS]\n";
    return 2;
  }
  const int threads = argc == 3 ? std::atoi(argv[2]) : 2;
  if (threads < 1) throw std::runtime_error("THREADS is 1 or more");
  const std::vector<Network::Image> images = read(argv[1]);
  const std::vector<int> labels = one_image_a_thread(images, static_cast<std::size_t>(threads));
  if (all_threads_an_image(images) != labels) throw std::runtime_error("threads that share a call give other labels");
  for (int label : labels) std::cout << label << '\n';
  return std::cout.flush() ? 0 : 1;
} catch (const std::exception &error) {
  std::cerr << error.what() << '\n';
  return 1;
}
