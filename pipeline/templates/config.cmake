# find_package([[ name ]] CONFIG PATHS <this folder> NO_DEFAULT_PATH), then link [[ name ]]::[[ name ]]. Generated: do not edit.
{% if manifest.emit == "c-lib" %}
if(NOT TARGET [[ name ]]::[[ name ]])
  add_library([[ name ]]::[[ name ]] SHARED IMPORTED)
  set_target_properties([[ name ]]::[[ name ]] PROPERTIES
    IMPORTED_LOCATION "${CMAKE_CURRENT_LIST_DIR}/lib[[ name ]].so"
    IMPORTED_NO_SONAME TRUE
    INTERFACE_INCLUDE_DIRECTORIES "${CMAKE_CURRENT_LIST_DIR}")
  add_library([[ name ]]::static STATIC IMPORTED)
  set_target_properties([[ name ]]::static PROPERTIES
    IMPORTED_LOCATION "${CMAKE_CURRENT_LIST_DIR}/lib[[ name ]].a"
    INTERFACE_INCLUDE_DIRECTORIES "${CMAKE_CURRENT_LIST_DIR}"
    INTERFACE_LINK_LIBRARIES m)
endif()
{% else %}
if(NOT TARGET [[ name ]]::[[ name ]])
  enable_language(C)
  add_library([[ name ]] STATIC "${CMAKE_CURRENT_LIST_DIR}/[[ name ]].c")
  target_include_directories([[ name ]] PUBLIC "${CMAKE_CURRENT_LIST_DIR}")
  target_compile_features([[ name ]] PRIVATE c_std_99)
  target_compile_options([[ name ]] PRIVATE -O3)  # -O2 of GCC leaves the loops over channels as they are
  target_link_libraries([[ name ]] PUBLIC m)
  add_library([[ name ]]::[[ name ]] ALIAS [[ name ]])
  add_library([[ name ]]::static ALIAS [[ name ]])
endif()
{% endif %}
